"""A model behind an API: requests, answers, a page, a log."""
