"""Records of exchanges: access log, latency histograms and the most frequent keys. Renders no metrics."""
