"""What is recorded of exchanges: access log, histograms and the most frequent keys. Renders no metrics."""
