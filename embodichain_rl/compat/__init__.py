"""The import paths of EmbodiChain's Online Data Streaming, with the classes of this library.

Replace the prefix ``embodichain`` by ``embodichain_rl.compat``, as in ``from embodichain_rl.compat.data_pipeline.engine
import OnlineDataEngine``. ``agents`` has the paths of its early versions, ``data_pipeline`` those of 0.2 and 0.3. The
page "Coming from EmbodiChain" of the documentation lists every name, and what differs.
"""
