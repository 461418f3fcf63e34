//! Control of a running machine: the contract with it, the protocol, and both ends of the socket.

pub mod machine;
