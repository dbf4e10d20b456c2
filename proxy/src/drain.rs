//! The end of a sidecar: what workers are told, in this order. Nothing here waits; the main thread keeps the time.

/// How far the end has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    #[default]
    Serving,
    /// Inbound answers carry `connection: close`; idle connections stay, because peers may be sending on them.
    Closing,
    /// By now peers have learnt that this endpoint is withdrawn: idle inbound connections are closed too.
    ClosingIdle,
    /// Workers return.
    Stopped,
}
