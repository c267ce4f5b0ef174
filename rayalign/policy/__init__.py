"""The model under training: how it is loaded, adapted, run over pairs, checked and saved."""
