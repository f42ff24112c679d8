"""What a picture says more about: charts from runs, and each way to draw them."""
