"""Where rows come from: files, the Hub, what Python brings."""
