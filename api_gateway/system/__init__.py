"""Access to the operating system: clocks, descriptors, memory, sockets, signals, output, files. No HTTP here."""
