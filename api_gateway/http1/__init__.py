"""The grammar of HTTP/1.1 and the rules on header fields: bytes in, values out. Opens no sockets."""
