"""Which tile of 128 x 128 comes when: neighbours in this order run side by side.

What they share then comes from L2, and what they write in 128x1 tiles, as [K, M] in pieces of 128 bytes, is a stretch of as many
pieces as row tiles come before the next column tile.
"""

def place(e, block, m_tiles: int, k_tiles: int, walk: int, halves: int = 1):
    """Batch, row tile and column tile of a block: bands of `walk` row tiles (0 is 1, negative: all), in a band column tile after column
    tile. halves: the columns' halves side by side, a block each for the same columns of both. e: an `Emit`; block i32, as the results."""
    columns, rows = k_tiles // halves, m_tiles if walk < 0 else min(max(walk, 1), m_tiles)
    half, block = (e.rem(block, halves), e.div(block, halves)) if halves > 1 else (None, block)
    batch = e.div(block, columns * m_tiles)
    if rows == 1:
        tile_m, tile_k = e.rem(e.div(block, columns), m_tiles), e.rem(block, columns)
    else:
        tile = e.rem(block, columns * m_tiles)
        band, tile = e.div(tile, columns * rows), e.rem(tile, columns * rows)
        tile_k, row = e.div(tile, rows), e.rem(tile, rows)
        if last := m_tiles % rows:  # the last band is as high as what is left
            whole = e.less(band, m_tiles // rows)
            tile_k, row = e.either(whole, tile_k, e.div(tile, last)), e.either(whole, row, e.rem(tile, last))
        tile_m = e.add(e.mul(band, rows), row)
    return batch, tile_m, tile_k if half is None else e.add(e.mul(half, columns), tile_k)
