"""Building blocks of the encoder-decoder: attention, feed-forward, norms, positions, layers."""
