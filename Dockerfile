# PYTHON_IMAGE and PIP_INDEX_URL say where the base image and the packages come from; every package's hash is in
# requirements.lock.
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build
ARG PIP_INDEX_URL=
WORKDIR /src
COPY . .
RUN python scripts/bootstrap.py /opt/bourse requirements.lock ".[alerts,archive,board,notify,watch]" \
 && /opt/bourse/bin/uv pip uninstall --python /opt/bourse/bin/python uv pip

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin bourse \
 && install --directory --owner bourse --group bourse /data
COPY --from=build /opt/bourse /opt/bourse
ENV PATH=/opt/bourse/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /data
ENTRYPOINT ["bourse"]
CMD ["--help"]
