"""Extensions of users: the interface of their hooks, how they are loaded and tried, and the calls of hooks."""
