"""Writes data/01_raw/iris.csv from the table that scikit-learn brings along."""

from pathlib import Path

from sklearn.datasets import load_iris

if __name__ == "__main__":
    bunch = load_iris(as_frame=True)
    frame = bunch.frame.rename(columns=lambda name: name.replace(" (cm)", "").replace(" ", "_"))
    frame["species"] = bunch.target_names[frame.pop("target")]
    Path("data/01_raw").mkdir(parents=True, exist_ok=True)
    frame.to_csv("data/01_raw/iris.csv", index=False)
