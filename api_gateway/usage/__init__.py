"""Usage: what clients have used, counted by day, client and route, and kept in the state folder."""
