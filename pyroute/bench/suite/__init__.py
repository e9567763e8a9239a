"""The benchmark suite: cases by model, columns of pyroute and its peers, and what is made of their times."""
