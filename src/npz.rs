//! NumPy .npz files. (being written)
