"""Drawing: charts as data (`reporting.charts`) become pictures, in a page or in files.

For a page `svg` draws lines, bars and the bars of tokens, `svg_blocks` the map of a model's blocks. In files and
notebooks `plots` draws every chart with matplotlib, and `forest` a plot of effect sizes, which pages do not have.
`figures` makes and saves matplotlib's figures. All take their colours from `colours`; `scales` has the axes' ticks.
"""
