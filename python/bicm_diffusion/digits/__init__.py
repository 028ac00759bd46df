"""A worked example on real data: a small noise predictor for scikit-learn's handwritten digits."""
