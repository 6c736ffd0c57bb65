"""One file is one target. A name that begins with an underscore runs only when it is asked for."""
