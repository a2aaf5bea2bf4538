"""Teachers run by vLLM's offline engine, with the selection made inside its worker."""
