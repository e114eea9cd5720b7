"""One proxied request: route, deadline, body, attempts, fallback, WebSocket, SSE, costs. Knows no operators."""
