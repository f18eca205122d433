"""
Features of time series in a scikit-learn pipeline
==================================================

A convolutional encoder learns features of time series without labels; scikit-learn does the rest. Everything here runs
in a few seconds on one core: the encoder is small, and is trained for a hundred steps. The defaults of
:class:`~pykernels.models.usrl.USRLTransformer` are those of the publication (ten blocks, four encoders, 1500 to 2000
steps each) and take minutes.

Needed are the extras ``models``, ``data`` and ``plot``.
"""

# %%
# The data
# --------
# BasicMotions: the accelerometer and the gyroscope of a watch, three axes each, during four activities. The series are
# an array (cases, channels, time), as in aeon. :func:`pykernels.data.load` reads the files that aeon carries and
# normalises them as published; nothing is downloaded.

import matplotlib.pyplot as plt
import numpy as np

from pykernels.data import load

motions = load("BasicMotions")
print("training", motions.X_train.shape, "test", motions.X_test.shape)

activities = list(np.unique(motions.y_train))
figure, axes = plt.subplots(len(activities), sharex=True, figsize=(7, 5), layout="constrained")
for ax, activity in zip(axes, activities, strict=True):
    case = motions.X_train[motions.y_train == activity][0]
    ax.plot(case.T, linewidth=0.9)
    ax.set_ylabel(activity)
axes[-1].set_xlabel("sample")
figure.suptitle("one series of each activity, all six channels")

# %%
# The pipeline
# ------------
# :class:`~pykernels.models.usrl.USRLTransformer` is a scikit-learn transformer: ``fit`` trains the encoder (``y`` is
# not used), ``transform`` returns one vector for each series, whatever its length. What comes behind is up to you.

from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pykernels.models.usrl import USRLTransformer

encoder = USRLTransformer(
    n_negatives=5,
    n_steps=100,
    channels=16,
    depth=4,  # dilations 1, 2, 4, 8, and 16 in the last block
    reduced_size=40,
    out_channels=64,
    random_state=0,
)
pipeline = make_pipeline(encoder, StandardScaler(), LogisticRegression(max_iter=1000))
pipeline.fit(motions.X_train, motions.y_train)
print(f"test accuracy {pipeline.score(motions.X_test, motions.y_test):.3f}")

# %%
# Cross-validation
# ----------------
# Each fold trains an encoder of its own, so no feature has seen the series that it is judged on. Raw values through the
# same classifier show what the features bring.

folds = StratifiedKFold(4, shuffle=True, random_state=0)
raw = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
learned_scores = cross_val_score(pipeline, motions.X_train, motions.y_train, cv=folds)
raw_scores = cross_val_score(raw, motions.X_train.reshape(len(motions.X_train), -1), motions.y_train, cv=folds)
print(f"learned features {learned_scores.mean():.3f}, raw values {raw_scores.mean():.3f}")

# %%
# What the encoder sees
# ---------------------
# The training used no labels. Still the activities lie apart in the first two principal components of the test
# features.

from sklearn.decomposition import PCA

features = pipeline[:-1].transform(motions.X_test)
plane = PCA(2).fit_transform(features)
figure, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
for activity in activities:
    ax.scatter(*plane[motions.y_test == activity].T, label=activity, alpha=0.8)
ax.set(xlabel="first component", ylabel="second component", title="test series, by features learned without labels")
ax.legend(frameon=False)

# %%
# Saving and loading
# ------------------
# A fitted pipeline pickles, also with joblib. Load such files from sources that you trust only: unpickling runs code.

import tempfile
from pathlib import Path

import joblib

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "motions.joblib"
    joblib.dump(pipeline, path)
    loaded = joblib.load(path)
    print(f"{path.stat().st_size / 1024:.0f} KiB")

np.testing.assert_array_equal(loaded.predict_proba(motions.X_test), pipeline.predict_proba(motions.X_test))
