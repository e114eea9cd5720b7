"""Server, supervisor, workers and listeners: the processes of a gateway, and their signals. Decides no request."""
