"""One proxied request: route, deadline, body, attempts, fallback, WebSocket, event streams and costs."""
