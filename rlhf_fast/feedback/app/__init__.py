"""The web application on which people compare responses: server, security, pages, texts."""
