"""A pytest plugin: gateways in front of scripted upstreams, for the tests of users. Serves no production traffic."""
