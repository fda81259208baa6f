//! (see house.md)
