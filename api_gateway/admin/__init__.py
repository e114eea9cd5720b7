"""The operator endpoints: authentication, views and explanations. Independent of the data plane's requests."""
