//! The layers that models are made of. Each says at its load line how it is shared among ranks.

pub mod embedding;
pub mod linear;
pub mod norm;
pub mod rope;
