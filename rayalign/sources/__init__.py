"""Where rows come from: files, folders, their containers, and the catalogue of registered data sets."""
