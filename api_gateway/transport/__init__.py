"""The upstream's side: pool, connection, request, response and the httpx adapter. Decides no retries."""
