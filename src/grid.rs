//! Sample grids as PNG files. (being written)
