"""How far off a result may be: predictors, perturbed runs, the calibrated map."""
