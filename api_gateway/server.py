"""The gateway's protocol for a uvicorn server: `uvicorn api_gateway.main:app --http api_gateway.server:protocol`."""

from api_gateway.downstream.uvicorn_server import protocol

__all__ = ["protocol"]
