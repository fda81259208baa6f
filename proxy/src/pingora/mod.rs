//! The only folder that names Pingora: sockets in, sockets out, and the process around them.

pub(crate) mod certificates;
pub(crate) mod client;
pub(crate) mod downstream;
mod pool;
pub(crate) mod server;
pub(crate) mod upstream;
