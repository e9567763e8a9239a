"""``pyroute bench --gpu``: the CUDA kernels beside the card's own limits and their peers, with our bars."""
