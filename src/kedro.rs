//! kedro
