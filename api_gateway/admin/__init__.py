"""The operator endpoints: authentication of operators, views, and explanations. Proxies nothing."""
