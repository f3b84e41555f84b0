"""Signed distance fields fitted to posed frames."""
