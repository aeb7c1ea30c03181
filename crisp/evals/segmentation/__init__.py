"""Semantic segmentation by frozen patch features: nearest neighbours and logistic regression (CAPI's protocol).

command_knn.py, command_linear.py   evaluate_knn, evaluate_linear: start here
protocol.py    every constant             config.py      the choices
prepared.py    checks, features, split    scoring.py     predictions counted against the truth
layouts.py     which data set a folder is; ade20k.py, voc2012.py, cityscapes.py, folder.py: one each, on data.py
masks.py, truth.py, patches.py, extraction.py   files to labels and features of patches
standardise.py, bank.py                         what is learnt from
topk.py, neighbours.py                          the k-NN search and its vote
logistic.py, lbfgs.py                           the regression
miou.py        the score
"""
