//! The only folder that names Pingora: sockets in, sockets out, and the process around them.

pub(crate) mod client;
pub(crate) mod downstream;
pub(crate) mod server;
pub(crate) mod upstream;
