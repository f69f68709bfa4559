"""The three stages. Each module has one public function, `run(cfg, context)`, to be read top to bottom."""
