"""Logic without sockets and processes: values in, decisions out; clocks are arguments."""
