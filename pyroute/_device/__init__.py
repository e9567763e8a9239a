"""Floor 2: the ops for arrays on a GPU. One file per room allocates outputs and calls ``pyroute._cuda``."""
