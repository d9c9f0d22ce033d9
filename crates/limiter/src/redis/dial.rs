//! Sockets: TCP, TLS over it, or a path.

use std::future::Future;
use std::io;
use std::time::Duration;

use ::redis::aio::MultiplexedConnection;
use ::redis::{AsyncConnectionConfig, RedisConnectionInfo, RedisError};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::address::Endpoint;

/// How long all addresses of a host together may take to accept a connection.
const ACCEPT_DEADLINE: Duration = Duration::from_millis(500);
/// How long a new connection may take until it can be asked: accepted, encrypted, logged in.
pub(super) const CONNECT_DEADLINE: Duration = Duration::from_secs(1);

/// How servers are reached. Clones reach them the same way.
#[derive(Clone)]
pub(super) struct Dialer {
    pub(super) runtime: Handle,
    #[cfg(feature = "redis-tls")]
    pub(super) tls: Option<tokio_rustls::TlsConnector>,
}

/// One connection that was made; closed when dropped, whatever is still awaited from it.
pub(super) struct Socket {
    pub(super) connection: MultiplexedConnection,
    driver: AbortHandle,
}

impl Dialer {
    /// Connects and logs in.
    pub(super) async fn dial(
        &self,
        endpoint: &Endpoint,
        login: &RedisConnectionInfo,
        config: AsyncConnectionConfig,
    ) -> Result<Socket, RedisError> {
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no connection in time");
        timeout(CONNECT_DEADLINE, async {
            match endpoint {
                Endpoint::Unix(path) => self.greet(UnixStream::connect(path).await?, login, config).await,
                Endpoint::Tcp(host, port) => {
                    let stream = connect(host, *port).await?;
                    #[cfg(feature = "redis-tls")]
                    if let Some(tls) = &self.tls {
                        let name = tokio_rustls::rustls::pki_types::ServerName::try_from(host.clone());
                        let name = name.map_err(io::Error::other)?;
                        return self.greet(tls.connect(name, stream).await?, login, config).await;
                    }
                    self.greet(stream, login, config).await
                }
            }
        })
        .await
        .map_err(late)?
    }

    async fn greet(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        login: &RedisConnectionInfo,
        config: AsyncConnectionConfig,
    ) -> Result<Socket, RedisError> {
        let config = config.set_response_timeout(None);
        // The future that makes it is as large as what it is given.
        let made = Box::pin(MultiplexedConnection::new_with_config(login, stream, config));
        let (connection, driver) = made.await?;
        Ok(Socket { connection, driver: self.drive(driver) })
    }

    fn drive(&self, driver: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        self.runtime.spawn(driver).abort_handle()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// One address after the other, none of which may use up the time of the others.
async fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let addresses: Vec<_> = tokio::net::lookup_host((host, port)).await?.collect();
    let mut problem = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in &addresses {
        match timeout(ACCEPT_DEADLINE / addresses.len() as u32, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Ok(Err(error)) => problem = error,
            Err(_) => problem = io::Error::new(io::ErrorKind::TimedOut, "no connection in time"),
        }
    }
    Err(problem)
}
