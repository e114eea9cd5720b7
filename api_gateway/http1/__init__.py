"""HTTP/1.1 syntax and header field rules, without input or output."""
