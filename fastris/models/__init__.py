"""Complete models, composed from :mod:`fastris.nn`."""
