"""Nearest neighbour on the iris table: frames with a shuffled index, and series."""

import logging
from typing import Any, Dict, Tuple

import numpy as np
import pandas as pd
from kedro.pipeline import node, pipeline


def split_data(data: pd.DataFrame, parameters: Dict[str, Any]) -> Tuple[pd.DataFrame, pd.DataFrame, pd.Series, pd.Series]:
    train = data.sample(frac=parameters["train_fraction"], random_state=parameters["random_state"])
    test = data.drop(train.index)
    target = parameters["target_column"]
    return train.drop(columns=target), test.drop(columns=target), train[target], test[target]


def make_predictions(X_train: pd.DataFrame, X_test: pd.DataFrame, y_train: pd.Series) -> pd.Series:
    train, test = X_train.to_numpy(), X_test.to_numpy()
    distances = ((test[:, None, :] - train[None, :, :]) ** 2).sum(axis=-1)
    predicted = y_train.iloc[np.argmin(distances, axis=1)]
    predicted.index = X_test.index
    return predicted


def report_accuracy(y_pred: pd.Series, y_test: pd.Series) -> None:
    accuracy = (y_pred == y_test).sum() / len(y_test)
    logging.getLogger(__name__).info("Model has accuracy of %.3f on test data.", accuracy)


def create_pipeline():
    return pipeline(
        [
            node(split_data, ["example_iris_data", "parameters"], ["X_train", "X_test", "y_train", "y_test"], name="split"),
            node(make_predictions, ["X_train", "X_test", "y_train"], "y_pred", name="make_predictions"),
            node(report_accuracy, ["y_pred", "y_test"], None, name="report_accuracy"),
        ]
    )
