"""Reading and editing the experts of a trained model. Training never imports this package."""
