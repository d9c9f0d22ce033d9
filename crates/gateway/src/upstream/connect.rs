//! Reaching a provider: TCP and TLS under one connect deadline, and what their errors mean.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tower_service::Service;

use super::Failure;

/// Opens connections.
pub type Connector = WithDeadline<HttpsConnector<HttpConnector>>;

/// An open connection.
pub(super) enum Stream {
    Tcp(TcpStream),
    Tls(Box<dyn Socket>),
}

/// What a connection is read from and written to.
pub(super) trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Socket for S {}

impl Stream {
    /// What a [`Connector`] opened, without what it is wrapped in.
    pub(super) fn of(opened: MaybeHttpsStream<TokioIo<TcpStream>>) -> Self {
        match opened {
            MaybeHttpsStream::Http(tcp) => Self::Tcp(tcp.into_inner()),
            MaybeHttpsStream::Https(tls) => Self::Tls(Box::new(tls.into_inner())),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_write_vectored(cx, bufs),
            Self::Tls(tls) => Pin::new(tls).poll_write_vectored(cx, bufs),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}

/// A connector for a base URL.
pub fn connector(base: &Uri, trust: &mut Trust, bound: Duration) -> Connector {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    // Without it Nagle and delayed acknowledgements add 40 ms to each small write.
    tcp.set_nodelay(true);
    let builder = HttpsConnectorBuilder::new().with_tls_config(trust.of(base));
    WithDeadline { inner: builder.https_or_http().enable_http1().wrap_connector(tcp), bound }
}

/// What an error of a [`Connector`] means for the attempt.
pub(super) fn failure(error: &(dyn std::error::Error + 'static)) -> Failure {
    told(error).unwrap_or_else(|| Failure::Unreachable(root_cause(error)))
}

/// Whom TLS connections trust. The system's anchors are read once, and only when a provider needs them.
#[derive(Default)]
pub struct Trust {
    system: Option<rustls::ClientConfig>,
}

impl Trust {
    /// What connections to this URL need.
    fn of(&mut self, base: &Uri) -> rustls::ClientConfig {
        if base.scheme() != Some(&http::uri::Scheme::HTTPS) {
            return tls_config(rustls::RootCertStore::empty());
        }
        self.system.get_or_insert_with(|| tls_config(system_roots())).clone()
    }
}

/// The system's trust anchors, so that a private CA works as everywhere else; the bundled ones where there are none.
fn system_roots() -> rustls::RootCertStore {
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    roots
}

fn tls_config(roots: rustls::RootCertStore) -> rustls::ClientConfig {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring supports the default protocol versions")
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// A failure that one of the errors around it tells apart.
fn told(error: &(dyn std::error::Error + 'static)) -> Option<Failure> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(TooSlow(bound)) = error.downcast_ref() {
            return Some(Failure::TimedOut("connection", *bound));
        }
        let system = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
        let errno = system.map(rustix::io::Errno::from_raw_os_error);
        if let Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) = errno {
            return Some(Failure::NoDescriptors);
        }
        next = error.source();
    }
    None
}

/// No connection within this time.
#[derive(Debug)]
struct TooSlow(Duration);

impl std::fmt::Display for TooSlow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no connection within {:?}", self.0)
    }
}

impl std::error::Error for TooSlow {}

/// The innermost error says what happened; those around it say who noticed.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// A connector whose TCP and TLS handshakes together must finish in time.
#[derive(Clone)]
pub struct WithDeadline<C> {
    inner: C,
    bound: Duration,
}

type Connecting<T> =
    Pin<Box<dyn Future<Output = Result<T, Box<dyn std::error::Error + Send + Sync>>> + Send>>;

impl<C> Service<Uri> for WithDeadline<C>
where
    C: Service<Uri, Error = Box<dyn std::error::Error + Send + Sync>>,
    C::Future: Send + 'static,
{
    type Response = C::Response;
    type Error = C::Error;
    type Future = Connecting<C::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (connecting, bound) = (self.inner.call(uri), self.bound);
        Box::pin(async move {
            match tokio::time::timeout(bound, connecting).await {
                Ok(connected) => connected,
                Err(_) => Err(TooSlow(bound).into()),
            }
        })
    }
}
